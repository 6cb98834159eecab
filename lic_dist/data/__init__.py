"""Photos: which files are, what they decode to, which are set aside, and the crops that a plan takes from them.

In: a folder. Out: a `Manifest` of its photos, `Crops`, and pixels uint8 of each. The same
folder gives the same manifest and crops, in any order of work. Imports the ground alone (errors, text, progress).
"""
