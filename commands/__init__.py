"""The commands, thin: options in, a stage called, its result printed. Heavy imports happen inside
them."""
