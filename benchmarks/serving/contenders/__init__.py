"""The engines that are measured beside each other: each in a process, and where need be an environment, of its own."""
