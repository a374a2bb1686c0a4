"""Traffic between versions: who gets which arm, what the arms' answers were like, and what follows from it."""
