"""The `multicam` command: `main` reads the words, and each command is a file."""
