"""Where the output goes: staged, made durable, renamed into place, marked complete last."""
