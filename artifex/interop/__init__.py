"""Other frameworks: what is planned here, in their words."""
