"""Training of routers and adapters on a frozen base model: text, losses, steering, runs."""
