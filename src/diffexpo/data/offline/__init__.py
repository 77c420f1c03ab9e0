"""Importers of offline preference sets, one file per format.

votes          votes to verified pairs, what is dropped, and the contract of a format
sources        the files and images of a set, found and read within limits
reading        rows of Parquet, CSV and JSON, a few in memory at a time
image_files    whether an image's file is whole
formats        which formats there are and how one is recognised
writing        any set as Parquet shards in the Pick-a-Pic v2 columns, without a model
summary        what a set holds
ingest         any set into a run's store, every image encoded once (the torch side)
"""
