"""The web app: from a folder of pictures to the right file, in a browser."""
