"""The server's part of a round: the student's update and the distillation."""
