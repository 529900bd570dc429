"""What the commands of `python -m gmp` do: each is a form over one engine function."""
