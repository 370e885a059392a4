"""From a library to one adapter of a new task: what is learnt before makes the beginning, or is all that is learnt."""
