"""Starting and stopping runs of several processes."""
