"""What a build or a tuning needs of memory and disk, from shapes alone, before anything is loaded."""
