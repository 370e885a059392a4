"""What a library is worth: held-out loss, multiple choice and generation of each way to use it, beside controls."""
