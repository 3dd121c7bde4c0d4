"""Problems to meta-train on: distributions of functions to minimise."""
