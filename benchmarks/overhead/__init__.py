"""What ScaleOT costs: the trainer against a bare loop, emulator against full model, object store against memcpy."""
