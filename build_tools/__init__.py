"""What builds the compiled libraries: setup.py and the build backend use it; it is no part of the installed package."""
