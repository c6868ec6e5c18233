"""Where tensors come from: what the user typed, the Hub, checkpoints and adapters on disk; opened, mapped, handed out."""
