"""The actors: coordinator, model owner, data owners, evaluators, and how artefacts pass between them."""
