"""One client's part of a round: local training, companions and what is exchanged."""
