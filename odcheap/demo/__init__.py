"""A local web page that classifies images with an export."""
