"""Photos: which files are photos, how they decode, which are set aside, and the crops that a plan takes from them.

In: a folder. Out: a `Manifest` of its photos, `Crops`, and the pixels of each crop as uint8. The same folder gives the
same manifest and crops, whatever the order of the work. Imports the ground alone (errors, text, progress).
"""
