"""Where tensors come from: what the user typed, the Hub, checkpoints and adapters on disk; opened and handed out."""
