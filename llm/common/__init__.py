"""What every part uses: errors, files, devices, tables ... Imports nothing of ours."""
