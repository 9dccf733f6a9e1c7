"""Bytes on disk: files that appear whole or not at all, and files of others, read without trust."""
