/* Speaks to a manager as C restorers of old do: text, MSG_EOR, a second string, and four bytes read of each reply. */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int ask(int sock, const char *what, const void *request, size_t length)
{
	int status;

	if (send(sock, request, length, MSG_EOR) != (ssize_t)length) {
		perror("send");
		return 1;
	}
	if (recv(sock, &status, sizeof(status), 0) != sizeof(status)) {
		perror("recv");
		return 1;
	}
	printf("%s %d\n", what, status);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char request[4096];
	int sock = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	size_t length, end;

	if (argc != 4)
		return 2;
	strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
	if (connect(sock, (struct sockaddr *)&address, sizeof(address))) {
		perror("connect");
		return 1;
	}
	length = snprintf(request, sizeof(request),
			  "mount;id=%d;mode=restore;mountpoint=%s;ns_pid=%s;ns_list=user,net,mnt;root=%s", 87, argv[2],
			  argv[3], "(null)");
	if (ask(sock, "mount", request, length + 1) || ask(sock, "again", request, length + 1))
		return 1;

	/* The trailing ';' of the request becomes the NUL between it and the options. */
	end = snprintf(request, sizeof(request),
		       "replace;id=%d;source=%s;type=%s;flags=%ld;bindmounts=%s;freeze_cgroup=%s;", 87, "none", "tmpfs",
		       1024L, "(null)", "/sys/fs/cgroup/freezer/(null)");
	length = end + snprintf(request + end, sizeof(request) - end, "%s", "size=1m,mode=755");
	request[end - 1] = '\0';
	if (ask(sock, "replace", request, length + 1))
		return 1;

	/* What an action script then asks for, with the replace held back here. */
	length = snprintf(request, sizeof(request), "replace;all;mode=hold");
	return ask(sock, "hold", request, length + 1);
}
