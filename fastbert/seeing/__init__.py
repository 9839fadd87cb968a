"""What `fastbert explain` shows of a text: its tokens by how much each counts, and its attention maps; as a page."""
