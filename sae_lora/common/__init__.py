"""What every room uses and no room is about: errors, files, locks, signals, the console."""
