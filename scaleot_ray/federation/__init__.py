"""Ray actors of a run and what moves artefacts between them; the environment ``local``."""
