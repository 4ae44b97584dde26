"""The commands: options in, one call, its result printed. Heavy imports happen inside them."""
