def write_report(setting): return "nothing yet"
