"""What ScaleOT's emulators are worth: the standard table for several tasks, seeds, triplets and builders."""
