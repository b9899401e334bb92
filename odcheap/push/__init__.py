"""Uploads an export to the Hugging Face Hub."""
