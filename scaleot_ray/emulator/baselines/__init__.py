"""Other ways to choose what an emulator hides, behind the same builder and in the same tables."""
