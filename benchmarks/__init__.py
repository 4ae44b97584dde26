"""Programs that measure this suite; nothing imports them."""
