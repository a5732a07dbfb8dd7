"""Making a model one's own, and making it smaller. Needs no torch until it is asked for something."""
