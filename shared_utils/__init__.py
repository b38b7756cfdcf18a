"""Small helpers that every experiment uses and that know nothing of any experiment."""
