"""What is asked of one model: its carriers, its replies under interventions, and the claims."""
