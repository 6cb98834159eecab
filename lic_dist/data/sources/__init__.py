"""The sources of photos: where their files lie (files.py, remote_files.py), what the files are (the others), and which
source a text names (opening.py).
"""
