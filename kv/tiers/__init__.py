"""Where encoded blocks lie."""
