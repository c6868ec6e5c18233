"""The PEFT types beside LoRA, one file each: a declaration and its formula."""
