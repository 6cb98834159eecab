"""Photos: which files are photos, how they decode, which are set aside, and the crops that a plan takes from them.

In: a source of photos, a folder, a bucket, archives ... (sources/). Out: a `Manifest` of its photos, `Crops`, and the
pixels of each crop as uint8. The same photos give the same crops, whatever the order of the work and wherever they are.
Imports the ground alone (errors, text, progress, remote).
"""
