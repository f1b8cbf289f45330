"""What torch and Python do while a verb runs: kinds of operators, devices, random numbers."""
