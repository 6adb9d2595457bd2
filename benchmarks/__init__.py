"""Measurements: speed and memory side by side with PyTorch, timm, torchvision and others. See conftest.py."""
