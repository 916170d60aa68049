"""How good a trajectory was: rank, probability, reward, advantage."""
