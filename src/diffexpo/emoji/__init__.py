"""The embedded emoji world: pictures, captions, small base models, judges, and the code that made them."""
