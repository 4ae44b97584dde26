"""Claims about trainings, one file each."""
