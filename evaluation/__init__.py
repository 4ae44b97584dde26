"""What is attacked and how it is scored: behaviour sets, judges, success rates."""
