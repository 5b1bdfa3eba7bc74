"""The process that leads a run: it starts the actors, watches them, and knows what is to be done next."""
