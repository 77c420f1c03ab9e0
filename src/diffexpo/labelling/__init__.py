"""People compare images: the book of questions and votes, the rating page, and what the votes say. Loads
without torch."""
