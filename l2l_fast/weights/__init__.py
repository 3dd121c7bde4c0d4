"""Rules that come with the package, as safetensors files."""
