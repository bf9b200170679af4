"""The save helper that libxl runs for xl save, restore and migrate."""
