"""The built-in text: code, prose, mathematics and a broad mix, found on this machine."""
